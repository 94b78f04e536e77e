"""`python -m finetune`, for launchers that start modules."""

from finetune.cli import main

if __name__ == "__main__":
    main()
