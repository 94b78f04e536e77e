"""Fine-tune vision-language models from one YAML recipe.

The floors of the house, lowest first. A module imports from its own line only what stands before it
on that line, and from any line above it in this list; never from a line below.
`tests/test_house.py` holds this order.

    errors  patterns  packages  processes  stopping
    recipe.messages  recipe.syntax  recipe.files  recipe.fields  recipe.conflicts
    recipe.schema  recipe.loading
    recipe.copying
    recipe  recipe.docs  rundir  checkpoints  hub
    data  data.signatures  data.truncation  data.pdf  data.downloads  data.patience  data.pillow
    data.images  data.views  data.packed_views
    families.family  families.idefics2  families.idefics3  families.smolvlm
    families.llava  families.mantis  families.mllama  families.idefics
    families
    data.render  data.shorten  data.augment  data.sequences
    data.containers.files  data.containers.cleaning  data.containers.json_text
    data.containers.container
    data.containers.cached  data.containers.compressed  data.containers.json_rows
    data.containers.delimited  data.containers.documents  data.containers.tar_shards
    data.containers.image_folders  data.containers.arrow  data.containers.hub
    data.containers.kinds  data.containers.shards  data.containers.streams
    data.containers.opening  data.containers
    data.sources  data.stamps  data.vision_cache  data.pictures  data.examples
    data.examination  data.examined
    data.gathering  data.batches  data.heaviest  data.sampling
    data.loaders  data.collate  data.streaming
    model  model.parts  model.compiling  model.quantize  model.varlen  model.vision
    model.attention  model.load
    model.vocabulary  model.adapters  model.vision_cache  model.lora  model.pissa
    model.sharding  model.methods
    model.optimizer  model.generate  model.loss
    model.checkpoint_files  model.merging
    model.tracing  model.kernels  model.memory  model.planned
    metrics.text  metrics.vqa  metrics.chart  metrics.choice  metrics.caption  metrics.fields
    metrics.bootstrap  metrics
    environment
    charts  run_charts  gallery  verdict  report  watching
    checking  check_page  preview_page
    resuming  stream_lists  callbacks  arguments  row_numbers  stream_progress  bad_steps
    out_of_memory  saving  trainer
    sides  asking  judging  preparation  data_summary  vision_cache_plan  planning  fitting
    training  finished  endings  summary
    engines  requirements  verifying  answering  serving  card  suites
    tables
    train  merge  serve  evaluate  push  chat  check  preview  convert  plan  score  compare
    launch
    cli_deploy  cli_judge  cli
    __main__
"""

__version__ = "0.1.0"
