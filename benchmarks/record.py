"""What a benchmark prints, in sections of a file, so that a part can be measured again by itself, and on what machine.
Not run by itself."""

import os
import platform
import re
import sys
from pathlib import Path

import torch

from sae_hooks.kernels.cpu_products import ZEN_5
from sae_hooks.kernels.signs import HAS_BFLOAT16


def cpu() -> str:
    """How many cores, of what, with what instructions, and the versions that matter, as far as the system tells."""
    try:
        names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                 if line.startswith("model name")]
    except OSError:
        names = []
    instructions = torch.backends.cpu.get_cpu_capability() + ", bfloat16" * HAS_BFLOAT16 + ", Zen 5" * ZEN_5
    return (f"{os.cpu_count()}-core CPU ({names[0] if names else platform.machine()}, {instructions}), one thread; "
            f"Python {platform.python_version()}, torch {torch.__version__}")


class Record:
    """Lines on the screen and, if there is a path, in sections of a file, each with its command and `machine`."""

    def __init__(self, path: Path | None, machine: str) -> None:
        self.path, self.machine, self.now = path, machine, ""
        self.sections: dict[str, list[str]] = {}
        if path is not None and path.exists():
            for text in re.split(r"^== ", path.read_text(), flags=re.MULTILINE)[1:]:
                name, *lines = text.rstrip().splitlines()
                self.sections[name.removesuffix(" ==")] = lines

    def section(self, name: str) -> None:
        """Begin one; what a file had under this name is gone."""
        self.now, self.sections[name] = name, []
        print(f"\n== {name} ==", flush=True)
        self.say("python benchmarks/" + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]))
        self.say(self.machine)

    def say(self, line: str) -> None:
        """Print a line, and write it."""
        print(line, flush=True)
        self.sections[self.now].append(line)
        if self.path is not None:
            self.path.parent.mkdir(exist_ok=True)
            self.path.write_text("\n\n".join("\n".join([f"== {name} ==", *lines])
                                             for name, lines in self.sections.items()) + "\n")
