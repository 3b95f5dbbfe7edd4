"""What a benchmark prints, in sections of a file, so that a part can be measured again by itself. Not run by itself."""

import re
import sys
from pathlib import Path


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
