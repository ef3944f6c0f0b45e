"""The `lvspec` command."""

from __future__ import annotations

import signal

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Speculative decoding for Video-LLMs in vLLM.")


@app.callback()
def main() -> None:
    """Speculative decoding for Video-LLMs in vLLM."""


@app.command()
def demo() -> None:
    """Serve the bundled pair, send it videos over the OpenAI API, and compare it with decoding without a drafter."""
    from vllm_lvspec.demo import run_demo
    from vllm_lvspec.serving import ServerError

    # Whoever ends the demo ends its server: SIGTERM leaves the contexts as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = Console()
    try:
        run_demo(console)
    except ServerError as error:
        console.print(f"[red]{error}[/]", highlight=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("stopped")
        raise typer.Exit(130) from None


if __name__ == "__main__":
    app()
