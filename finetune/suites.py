"""Public benchmarks by name: which rows, how they are asked, what is measured, and what the paper
of Idefics2 gives to stand beside.

Figures of the paper are of idefics2-8b with images split (320 tokens an image), arXiv 2405.02246,
table 8 and huggingface.co/blog/idefics2. Validation rows are asked where answers of the test split
are not public, also where the paper's figure is of the test split.
"""

from dataclasses import dataclass

from finetune.recipe import DataSource

BRIEF = "Give a very brief answer."
LETTER = "Answer with the letter, or in a word where there are none."


@dataclass(frozen=True)
class Suite:
    """One benchmark."""

    source: DataSource
    metric: str
    prompt_suffix: str
    max_new_tokens: int
    paper: float | None
    paper_split: str = ""

    def beside(self) -> str:
        """What the paper gives, in words."""
        if self.paper is None:
            return "the paper of Idefics2 gives no figure for it"
        return (
            f"{self.metric} {self.paper:.3f} of idefics2-8b on {self.paper_split}, with split "
            "images, in the paper of Idefics2"
        )


SUITES = {
    "docvqa": Suite(
        DataSource(hub="lmms-lab/DocVQA", config="DocVQA", split="validation", format="docvqa"),
        metric="anls",
        prompt_suffix=BRIEF,
        max_new_tokens=32,
        paper=0.740,
        paper_split="test",
    ),
    "textvqa": Suite(
        DataSource(hub="lmms-lab/textvqa", split="validation", format="textvqa"),
        metric="vqa_accuracy",
        prompt_suffix=BRIEF,
        max_new_tokens=16,
        paper=0.730,
        paper_split="val",
    ),
    "vqav2": Suite(
        DataSource(hub="lmms-lab/VQAv2", split="validation", format="vqav2"),
        metric="vqa_accuracy",
        prompt_suffix=BRIEF,
        max_new_tokens=16,
        paper=0.812,
        paper_split="test-dev",
    ),
    "chartqa": Suite(
        DataSource(hub="lmms-lab/ChartQA", split="test", format="chartqa"),
        metric="relaxed_accuracy",
        prompt_suffix=BRIEF,
        max_new_tokens=16,
        paper=None,
    ),
    "mmmu": Suite(
        DataSource(hub="lmms-lab/MMMU", split="validation", format="mmmu"),
        metric="multiple_choice",
        prompt_suffix=LETTER,
        max_new_tokens=8,
        paper=0.430,
        paper_split="val",
    ),
}
