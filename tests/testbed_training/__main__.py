"""`python -m tests.testbed_training train` trains the testbed model; `… publish` writes it into the package."""

import typer

from tests.testbed_training.publish import publish
from tests.testbed_training.train import train_testbed

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Train the testbed model, and publish it.")
app.command("train")(train_testbed)
app.command("publish")(publish)

if __name__ == "__main__":
    app()
