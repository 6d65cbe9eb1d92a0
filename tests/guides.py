"""What tests of the guides share: the blocks of a page, a task for lm-eval, a chat template."""

import json
import re
from pathlib import Path

from conftest import ROOT

DOCS = ROOT / "docs"
TASK = """
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def blocks(page: Path, language: str) -> list[str]:
    """The code of a page in one language; `bash` are commands that are run, `sh` those that only GPUs can."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def write_task(folder: Path) -> None:
    """The task `mine` in the folder `tasks`, with one question."""
    (folder / "tasks").mkdir()
    question = json.dumps({"question": "1 + 1 =", "choices": ["2", "3"], "answer": 0})
    (folder / "questions.jsonl").write_text(f"{question}\n")
    (folder / "tasks" / "mine.yaml").write_text(TASK.replace("QUESTIONS", str(folder / "questions.jsonl")))
