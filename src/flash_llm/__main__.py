"""``python -m flash_llm``: the command line."""

from flash_llm.cli import main

if __name__ == "__main__":
    main()
