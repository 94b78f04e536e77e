"""Files, folders and Hub datasets as raw rows: what the file holds, before any converter."""

from finetune.data.containers.container import Container as Container
from finetune.data.containers.hub import open_hub as open_hub
from finetune.data.containers.opening import open_container as open_container
from finetune.data.containers.streams import Place as Place
from finetune.data.containers.streams import Reading as Reading
from finetune.data.containers.streams import Stream as Stream
from finetune.data.containers.streams import open_hub_stream as open_hub_stream
from finetune.data.containers.streams import open_stream as open_stream
