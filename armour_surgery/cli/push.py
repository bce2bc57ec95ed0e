"""`armour-surgery push MODEL REPO`."""

from typing import TYPE_CHECKING, Annotated

import typer

from armour_surgery.cli.options import AsJson
from armour_surgery.cli.run import command, console_for, print_json

if TYPE_CHECKING:
    from rich.console import Console

    from armour_surgery.sharing.upload import Pushed

__all__ = ["push"]


@command
def push(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder that convert or finetune wrote.", show_default=False)
    ],
    repo: Annotated[
        str,
        typer.Argument(
            metavar="REPO", help="ORG/NAME: your account or an organization, and the model's name.", show_default=False
        ),
    ],
    license: Annotated[
        str | None,
        typer.Option(
            "--license",
            metavar="ID",
            help="The license of the original, where the model card does not name it: apache-2.0, mit, ...",
            show_default=False,
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private. Default: as your account has it.")
    ] = False,
    revision: Annotated[
        str | None,
        typer.Option(
            "--revision", metavar="BRANCH", help="The branch to send to, made if need be.", show_default="main"
        ),
    ] = None,
    message: Annotated[
        str | None, typer.Option("--message", metavar="TEXT", help="Of the commit.", show_default=False)
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            "--include",
            metavar="PATTERN",
            help="Also send files that would be left out, such as 'onnx/*'; any number.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be sent, and send nothing; needs no token.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Send a saved folder to the Hugging Face hub, with its model card, in one commit.

    The token is the one of `hf auth login`, or HF_TOKEN. Run again after an interruption, it goes on; what has not
    changed is not sent twice.
    """
    console = console_for(as_json)
    with console.status("loading PyTorch"):
        from armour_surgery.sharing.upload import push as send

    # No spinner from here on: huggingface_hub draws bars of its own for what is large.
    pushed = send(
        model,
        repo,
        license=license,
        private=private,
        revision=revision,
        message=message,
        include=tuple(include or ()),
        dry_run=dry_run,
    )
    if as_json:
        print_json(pushed.to_dict())
        return
    _tell(console, pushed)


def _tell(console: "Console", pushed: "Pushed") -> None:
    from armour_surgery.saving.licenses import split_card
    from armour_surgery.saving.model_card import how_to_load

    def say(line: str, style: str | None = None) -> None:
        console.print(line, markup=False, soft_wrap=True, style=style)

    kind = "private" if pushed.private else "public, or as your account has it" if pushed.dry_run else "public"
    say(f"{pushed.model} -> {pushed.repo} ({kind}), branch {pushed.revision}, license {pushed.license}", "bold")
    width = max(len(file.name) for file in pushed.files)
    for file in pushed.files:
        say(f"  {file.name:<{width}}  {_size(file.bytes):>9}")
    for left in pushed.left_out:
        say(f"  left out: {left.name} ({left.reason})", "dim")
    if pushed.dry_run:
        head, _ = split_card(pushed.card)
        say("README.md begins with:")
        for line in (head or "").splitlines():
            say(f"    {line}", "dim")
        say("Nothing was sent (--dry-run).")
        return
    if not pushed.changed:
        say(f"Nothing had changed since the commit {pushed.commit}, so there is no new one: {pushed.url}")
    else:
        say(f"Sent: {pushed.url} (commit {pushed.commit})")
    for line in ("", *how_to_load(pushed.plan.source, pushed.name), ""):
        say(f"    {line}".rstrip())


def _size(count: int) -> str:
    if count < 1000:
        return f"{count} B"
    return f"{count / 1e3:.1f} kB" if count < 1e6 else f"{count / 1e6:,.1f} MB"
