"""python -m amed_engine: the command line, where its script is not on the path."""

from amed_engine.cli import main

if __name__ == "__main__":
    main()
