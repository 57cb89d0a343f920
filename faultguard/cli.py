"""The command `faultguard`."""

from __future__ import annotations

import logging
import sys

import click

__all__ = ["main"]


@click.group()
@click.version_option(package_name="faultguard")
def main() -> None:
    """Checkpoint, resume and retry for Ray tasks."""


@main.command()
@click.option("--address", default="auto", show_default=True, help="Of the cluster, as ray.init() takes it.")
@click.option("--checkpoint-dir", default=None, help="As faultguard.init() takes it.")
def doctor(address: str, checkpoint_dir: str | None) -> None:
    """Say whether a running cluster, and the store, are set up so that nothing is lost.

    Exit code 0: all is well; 1: something is to be mended; 2: there is no cluster.
    """
    import ray

    from faultguard._doctor import examine

    if address == "local" or address.startswith("ray://"):
        raise click.BadParameter("give the host:port of a running cluster, and run this on one of its nodes", param_hint="--address")
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        click.echo(f"no cluster at {address!r}: {error}", err=True)
        sys.exit(2)
    try:
        findings = examine(checkpoint_dir)
    finally:
        ray.shutdown()
    for finding in findings:
        click.echo(f"{'ok     ' if finding.ok else 'PROBLEM'}  {finding.where}: {finding.text}")
    sys.exit(0 if all(finding.ok for finding in findings) else 1)


if __name__ == "__main__":
    main()
