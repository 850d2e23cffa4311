"""Fast BLT (arXiv 2605.08044): training the decoder on masked blocks, and filling blocks in."""
