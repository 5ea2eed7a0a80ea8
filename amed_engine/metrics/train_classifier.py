"""`python -m amed_engine.metrics.train_classifier`; see `amed_engine.evaluation.metrics.train_classifier`."""

from amed_engine.evaluation.metrics.train_classifier import main

if __name__ == "__main__":
    main()
