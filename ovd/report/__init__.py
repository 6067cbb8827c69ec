"""The page of a detector's run: one self-contained HTML file; the building blocks are `pretrain.engine.html_page`'s."""
