"""The `blt-hf` command, also `python -m blt_hf.cli`. It lies in `blt_hf_cli`, which says why."""

from blt_hf_cli import app, main


__all__ = ["app", "main"]

if __name__ == "__main__":
    main()
