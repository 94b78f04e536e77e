"""Whether a run is finished: all steps taken, and the weights that are there judged."""

from contextlib import suppress
from pathlib import Path

from xxhash import xxh3_128

from finetune.checkpoints import last_whole
from finetune.processes import as_the_first_finds
from finetune.resuming import is_finished, owes_evaluation
from finetune.rundir import RunDir, read_json, read_jsonl
from finetune.training import Prepared


def nothing_is_left(prepared: Prepared) -> bool:
    """Whether nothing is left to do, as the first process finds it: all steps are taken, and the
    figures are those of the weights that are there.
    """

    def look() -> bool:
        # a broken summary is made anew, and a broken checkpoint told of where the run goes on
        with suppress(OSError, ValueError):
            return _is_judged(prepared, RunDir(prepared.recipe.output.dir))
        return False

    return as_the_first_finds(look)


def _is_judged(prepared: Prepared, run: RunDir) -> bool:
    summary = read_json(run.summary)
    # `eval` writes a summary, too, but without that where the run was killed before
    if summary.get("weights_xxh3_128") != digest_of_weights(run.adapter):
        return False
    if prepared.held_out and not run.predictions.is_file():
        return False
    if not summary["trainable_parameters"]:
        return True
    if not any(run.checkpoints.glob("*")):  # removed since, for their room
        logged = [line["step"] for line in read_jsonl(run.metrics) if "loss" in line]
        return logged[-1:] == [summary["steps"]]
    checkpoint = last_whole(run.checkpoints)
    return bool(
        checkpoint
        and is_finished(checkpoint, prepared.recipe.evaluation)
        and not still_owes_evaluation(prepared, checkpoint)
    )


def digest_of_weights(folder: Path) -> str:
    """Of the files with what was trained; raises `FileNotFoundError` without their folder."""
    digest = xxh3_128()
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            with path.open("rb") as file:
                while block := file.read(2**24):
                    digest.update(block)
    return digest.hexdigest()


def still_owes_evaluation(prepared: Prepared, checkpoint: Path) -> bool:
    return bool(prepared.held_out) and owes_evaluation(checkpoint, prepared.recipe.evaluation)
