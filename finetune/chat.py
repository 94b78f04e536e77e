"""`finetune chat`: one question about one or more images, answered by a run's adapter."""

from collections.abc import Sequence
from pathlib import Path

from data_formats.chat import Conversation, Image, Message, Text
from finetune.data.examples import Encoder
from finetune.data.images import ImageAccess
from finetune.data.sources import Row
from finetune.model.generate import generate_answers
from finetune.model.load import best_device, load_processor, quiet_libraries
from finetune.model.methods import load_trained
from finetune.model.vocabulary import add_extra_tokens
from finetune.recipe import load_recipe
from finetune.rundir import open_run_dir


def answer(path: str | Path, images: Sequence[Path], question: str) -> str:
    """The adapter's answer, with the image settings and prompt of its training. Raises
    `FinetuneError`.
    """
    quiet_libraries()
    run = open_run_dir(path)
    recipe = load_recipe(run.recipe, check_paths=False)
    processor, image_settings = load_processor(recipe.model, recipe.images)
    add_extra_tokens(processor, recipe)
    model, family = load_trained(recipe, run.adapter, processor)
    encoder = Encoder(processor, family, image_settings)
    content = (*(Image(str(image)) for image in images), Text(question))
    conversation = Conversation((Message("user", content), Message("assistant", ())))
    anywhere = ImageAccess(Path.cwd(), allow_outside_root=True)
    prompt = encoder.encode_prompt(Row("the question", conversation, anywhere))
    return generate_answers(
        model.to(best_device()),
        encoder.processor,
        family,
        [prompt],
        max_new_tokens=recipe.evaluation.max_new_tokens,
        batch_size=1,
        packed_vision=recipe.model.packed_vision,
    )[0]
