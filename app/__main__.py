"""`python -m app` is `growmoe`."""

from app.cli import main

if __name__ == "__main__":
    main()
