"""Fine-tune vision-language models from one YAML recipe.

The floors of the house, lowest first. A module imports from its own line only what stands before it
on that line, and from any line above it in this list; never from a line below.
`tests/test_house.py` holds this order.

    errors
    recipe.messages  recipe.syntax  recipe.files  recipe.fields  recipe.schema  recipe.loading
    recipe.copying
    recipe  recipe.docs  rundir
    data  data.images
    families.family  families.idefics2  families
    data.render
    data.sources  data.examples  data.collate
    model  model.load  model.adapters  model.generate
    metrics.text  metrics
    environment  tables
    charts  report
    callbacks  trainer
    judging  preparation
    train  evaluate  chat
    cli
"""

__version__ = "0.1.0"
