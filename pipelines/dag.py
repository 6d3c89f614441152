"""Which stage needs what, as a picture in docs/dvc.md: ``python pipelines/dag.py`` after a change of dvc.yaml.

The picture is what ``dvc dag --mermaid dvc.yaml`` prints. Git hosts draw it; the book shows it as a list (book/build.py).
"""

import subprocess
import sys

from medsec import paths
from medsec.ledger import replace_block

BEGIN, END = "<!-- dag: made by `python pipelines/dag.py`, do not edit -->", "<!-- end of dag -->"


def block() -> str:
    """The page's block, marks included, of the default pipeline as it is now.

    Raises:
        RuntimeError: DVC cannot read the pipeline; the message is DVC's.
    """
    command = [sys.executable, "-m", "dvc", "dag", "--mermaid", "dvc.yaml"]
    done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed: {done.stderr.strip()}")
    return f"{BEGIN}\n```mermaid\n{done.stdout.strip()}\n```\n{END}"


def main() -> None:
    page = paths.ROOT / "docs" / "dvc.md"
    text = page.read_text(encoding="utf-8")
    page.write_text(replace_block(text, BEGIN, END, block()), encoding="utf-8")


if __name__ == "__main__":
    main()
