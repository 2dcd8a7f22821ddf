"""`python -m mmembed`: the same as the command `mmembed`"""
import sys

from .cli import main

sys.exit(main())
