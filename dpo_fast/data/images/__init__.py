"""Images in prompts, from the columns of a row to the pixel values of a micro-batch.

columns.py    takes the images of a row out of its columns and messages, and marks their places
marks.py      the marks, which are text until a chat template writes its own placeholder there
files.py      bytes of an image, from a path, a URL, base64, bytes or PIL; and their pixels
store.py      images that came inside rows, kept beside the tokens
model.py      the processor of a model: the tokens of an image, and pixel values
tokens.py     an image in token ids: negative numbers, which tell one image from another
laid.py       the images of a micro-batch, every distinct one once
"""
