"""What the user wrote: one YAML file, checked as a whole.

`schema` says what a recipe holds, `loading` reads and writes it, `messages` words what is wrong.
"""

from finetune.recipe.fields import FORMATS, METRICS, PARTS
from finetune.recipe.files import recipes_dir, shipped_recipes
from finetune.recipe.loading import dump_recipe, load_recipe, make_source, recipe_warnings
from finetune.recipe.schema import (
    AdapterSection,
    Columns,
    DataSection,
    DataSource,
    EvaluationSection,
    ImagesSection,
    ModelSection,
    OutputSection,
    Recipe,
    TrainingSection,
)

__all__ = [
    "FORMATS",
    "METRICS",
    "PARTS",
    "AdapterSection",
    "Columns",
    "DataSection",
    "DataSource",
    "EvaluationSection",
    "ImagesSection",
    "ModelSection",
    "OutputSection",
    "Recipe",
    "TrainingSection",
    "dump_recipe",
    "load_recipe",
    "make_source",
    "recipe_warnings",
    "recipes_dir",
    "shipped_recipes",
]
