"""`python -m mmembed`: the same as the command `mmembed`"""
import sys

from .cli.main import main

sys.exit(main())
