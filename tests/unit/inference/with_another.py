"""A child that starts a process of its own at each order, and says its number."""

from __future__ import annotations

import subprocess

from llmkd.inference.child import DONE, listen


def main() -> int:
    _, orders, say = listen()
    for seconds in orders:
        say(f"{DONE}{subprocess.Popen(['sleep', str(seconds)]).pid}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
