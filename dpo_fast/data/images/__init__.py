"""Images in prompts, from the columns of a row to the pixel values of a micro-batch.

columns.py     takes the images of a row out of its columns and messages, and marks their places
marks.py       the marks, which are text until a chat template writes its own placeholder there
options.py     the size that one image is to have
files.py       bytes of an image, from a path, a URL, base64, bytes or PIL; and their pixels
rows.py        the images of a checked row, found before it is tokenised
store.py       images that came inside rows, kept beside the tokens
model.py       the tokens of an image and its pixel values, by the processor of a model
processor_options.py    data.images_kwargs, as the processor takes them
processor.py   loads a processor, without its video part where that cannot be loaded
expand.py      the images of a row in its texts and token ids
tokens.py      an image in token ids: negative numbers, which tell one image from another
laid.py        the images of a micro-batch, every distinct one once
known.py       the images of prompts that are completed
written.py     images as JSON has them, in rows and in requests
ahead.py       the next batch is made while one is trained on
"""
