"""A hook of mkdocs: the page commands.md is the `--help` of every command."""

from mkdocs.structure.files import File

from metaembed_jax import cli


def on_files(files, config):
    """Add the page of the commands."""
    pages = []
    for command in cli.COMMANDS:
        (subparsers,) = (action for action in cli.make_parser(command)._actions if action.dest == "command")
        pages.append(f"## {command}\n\n```text\n{subparsers.choices[command].format_help()}```\n")
    files.append(File.generated(config, "commands.md", content="# Commands\n\n" + "\n".join(pages)))
    return files
