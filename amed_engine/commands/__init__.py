"""Commands of `amed`, one a file; each imports what it runs when it runs."""
