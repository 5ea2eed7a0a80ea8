"""Commands of `amed`, one file each; `amed_engine.cli` registers them."""
