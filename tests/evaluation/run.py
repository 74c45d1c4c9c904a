"""lmms-eval with a small random model and a local task, from the command line: run by `make eval`, not by pytest."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from dualview.models import convert_inf_llava  # noqa: E402
from tests.released import write_released  # noqa: E402


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_released(folder / "released")
        convert_inf_llava(folder / "released", folder / "model")
        (folder / "task").mkdir()
        questions = folder / "questions.json"
        questions.write_text("\n".join(json.dumps({"colour": colour}) for colour in ("red", "green", "blue")))
        shutil.copy(Path(__file__).with_name("colours.py"), folder / "task")
        task = Path(__file__).with_name("colours.yaml").read_text().replace("QUESTIONS", str(questions))
        (folder / "task" / "colours.yaml").write_text(task)
        subprocess.run(
            [sys.executable, "-m", "lmms_eval", "--model", "dualview", "--model_args", f"pretrained={folder / 'model'}",
             "--tasks", "dualview_colours", "--include_path", str(folder / "task"), "--batch_size", "1",
             "--output_path", str(folder / "out"), "--log_samples"],
            check=True,
        )  # fmt: skip
        found = list((folder / "out").rglob("*samples*.jsonl"))
        assert len(found) == 1, "lmms-eval failed, and ended as if it had not: its error stands above"
        assert len(found[0].read_text().splitlines()) == 3, "each question is answered"
        (results,) = (folder / "out").rglob("*results*.json")
        assert "dualview_colours" in json.loads(results.read_text())["results"]
        print("lmms-eval ran dualview on 3 questions")


if __name__ == "__main__":
    main()
