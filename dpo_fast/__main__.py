"""python -m dpo_fast"""

from dpo_fast.cli import main

main()
