"""The `blt-hf` command, also `python -m blt_hf_cli`; one module for each of its commands.

This package lies beside `blt_hf`, because everything below `blt_hf` imports torch and transformers first. `--help` and the
TAB key do not wait for that: a command imports its modules when it runs.
"""

import typer

from . import byteify, calibrate, card, convert, evaluate, flops, generate, get, info, patches, train


app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _blt_hf() -> None:
    """Run, train and measure Byte Latent Transformers on the Hugging Face stack."""


app.command()(patches.patches)
app.command()(generate.generate)
app.command()(get.get)
app.command()(info.info)
app.add_typer(train.app, name="train")
app.add_typer(byteify.app, name="byteify")
app.command()(evaluate.evaluate)
app.command()(calibrate.calibrate)
app.command()(flops.flops)
app.command()(convert.convert)
app.command()(card.card)


def main() -> None:
    app(prog_name="blt-hf")


__all__ = ["app", "main"]
