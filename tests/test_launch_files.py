"""The files in recipes/launch, and what `training.distributed` makes of them: as accelerate's own
launcher reads them.
"""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousTimeoutError,
)
from torch.distributed.fsdp import StateDictType
from typer.testing import CliRunner

from finetune import engines
from finetune.cli import app
from finetune.engines import ENGINES, environment_of, launch_file, use_engine
from finetune.errors import RecipeError
from finetune.launch import launch, num_nodes
from finetune.processes import engine
from finetune.recipe import load_recipe, recipes_dir, shipped_recipes
from finetune.requirements import refuse_a_lonely_launch
from finetune.rundir import RunDir, read_json
from tests.commands import FINETUNE, free_port, run

KINDS = {
    "ddp": DistributedType.MULTI_GPU,
    "fsdp": DistributedType.FSDP,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
}
each_engine = pytest.mark.parametrize("name", ENGINES)


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """As it was, whatever accelerate sets."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def set_by_accelerate(name: str) -> dict[str, str]:
    """What `accelerate launch` puts into the environment of its processes."""
    words = ["--config_file", str(launch_file(name)), "--num_processes", "2", "-m", "finetune"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ""
        return prepare_deepspeed_cmd_env(args)[1]
    return prepare_multi_gpu_env(args)


# The files


@each_engine
def test_accelerate_reads_the_file(name: str) -> None:
    config = load_config_from_file(str(launch_file(name)))
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type == KINDS[name]
    assert config.num_processes == -1  # or so many would be started, asked for or not


def test_every_file_is_an_engine_s_and_none_is_a_recipe() -> None:
    files = {path.stem for path in (recipes_dir() / "launch").iterdir()}
    assert files == set(ENGINES)
    assert not any("launch" in name for name in shipped_recipes())


@each_engine
def test_the_file_opens_with_the_two_commands_that_do_the_same(name: str) -> None:
    text = launch_file(name).read_text(encoding="utf-8")
    words = f"accelerate launch --config_file recipes/launch/{name}.yaml --num_processes 8"
    dry = " --dry-run" if name == "zero3" else ""  # which is refused otherwise
    assert f"{words} -m finetune train RECIPE{dry}\n" in text
    setting = "" if name == "ddp" else f"training.distributed={name} "
    assert f"finetune train RECIPE {setting}--processes 8{dry}\n" in text


@each_engine
def test_the_recipe_s_key_sets_what_accelerate_launch_sets(name: str) -> None:
    ours, theirs = environment_of(name), set_by_accelerate(name)
    assert ours.items() <= theirs.items()
    told = {key for key in theirs.keys() - os.environ.keys() if "USE_" in key}
    assert {key for key in told if key in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")} == {
        key for key in ours if key.startswith("ACCELERATE_USE_")
    }


def test_accelerate_s_plugin_for_fsdp_is_the_same_by_either_way() -> None:
    os.environ.update(environment_of("fsdp"))
    ours = FullyShardedDataParallelPlugin()
    os.environ.update(set_by_accelerate("fsdp"))
    theirs = FullyShardedDataParallelPlugin()
    for key, value in vars(theirs).items():
        assert repr(vars(ours)[key]) == repr(value), key
    assert ours.fsdp_version == 2
    assert ours.reshard_after_forward is True
    assert ours.state_dict_type is StateDictType.FULL_STATE_DICT
    assert not ours.cpu_ram_efficient_loading
    assert not ours.activation_checkpointing


@pytest.mark.parametrize(("name", "stage"), [("zero2", 2), ("zero3", 3)])
def test_accelerate_s_plugin_for_deepspeed_is_the_same_by_either_way(name: str, stage: int) -> None:
    os.environ.update(environment_of(name))
    ours = DeepSpeedPlugin()
    os.environ.update(set_by_accelerate(name))
    assert DeepSpeedPlugin().deepspeed_config == ours.deepspeed_config
    assert ours.zero_stage == stage
    assert ours.zero3_init_flag is False
    assert ours.zero3_save_16bit_model is (stage == 3)
    assert engine() == name


# The key


@pytest.fixture
def on_two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as `use_engine` asks: one of two processes, on GPUs, with DeepSpeed installed."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(engines, "has_devices", lambda: True)
    monkeypatch.setattr(engines, "missing", lambda packages: [])


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero2"])
def test_an_engine_by_name_is_what_accelerate_is_told(
    name: str, dataset: Callable[..., Path], on_two_gpus: None
) -> None:
    recipe = load_recipe(
        dataset(evaluation={"rows_in_training": 0}), [f"training.distributed={name}"]
    )
    assert use_engine(recipe, "mine.yaml").training.distributed == name
    assert engine() == name


def test_zero3_is_refused_and_may_be_tried_dry(
    dataset: Callable[..., Path], on_two_gpus: None
) -> None:
    recipe = load_recipe(dataset(), ["training.distributed=zero3"])
    with pytest.raises(RecipeError, match="set fsdp, which shards the same weights"):
        use_engine(recipe, "mine.yaml")
    assert use_engine(recipe, "mine.yaml", dry_run=True) == recipe


@pytest.mark.parametrize("name", ["fsdp", "zero2"])
def test_an_engine_that_the_launcher_tells_is_written_into_the_recipe(
    name: str, dataset: Callable[..., Path], on_two_gpus: None
) -> None:
    recipe = load_recipe(dataset(evaluation={"rows_in_training": 0}))
    assert use_engine(recipe, "mine.yaml").training.distributed is None
    os.environ.update(set_by_accelerate(name))
    assert use_engine(recipe, "mine.yaml").training.distributed == name


@pytest.mark.parametrize(
    ("settings", "told", "message"),
    [
        (["training.distributed=fsdp"], "zero2", "fsdp, and the launcher asks for zero2"),
        (["training.distributed=ddp"], "fsdp", "ddp, and the launcher asks for fsdp"),
        (["training.optimizer=lion_32bit"], "fsdp", "training.optimizer: lion_32bit"),
        (["evaluation.rows_in_training=5"], "fsdp", "set evaluation.rows_in_training: 0"),
    ],
)
def test_what_the_launcher_s_engine_cannot_do_is_refused(
    settings: list[str], told: str, message: str, dataset: Callable[..., Path], on_two_gpus: None
) -> None:
    path = dataset(evaluation={"rows_in_training": 0})
    recipe = load_recipe(path, settings)
    os.environ.update(set_by_accelerate(told))
    with pytest.raises(RecipeError, match=message):
        use_engine(recipe, "mine.yaml")


def test_zero2_loads_no_checkpoint_since_deepspeed_would_unpickle_it(
    dataset: Callable[..., Path], on_two_gpus: None
) -> None:
    path = dataset(evaluation={"rows_in_training": 0, "load_best": True})
    zero2, fsdp = (
        load_recipe(path, [f"training.distributed={name}"]) for name in ("zero2", "fsdp")
    )
    with pytest.raises(RecipeError, match="2 problems") as error:
        use_engine(zero2, "mine.yaml", resume=True)
    assert "zero2 has no --resume: DeepSpeed unpickles its checkpoints" in str(error.value)
    assert "evaluation.load_best: is not for training.distributed: zero2" in str(error.value)
    assert use_engine(fsdp, "mine.yaml", resume=True) == fsdp


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"FSDP_VERSION": "1"}, "fsdp_version: set 2"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "set TRANSFORMER_BASED_WRAP"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "ram_efficient_loading: set false"),
        ({"FSDP_TRANSFORMER_CLS_TO_WRAP": "MistralDecoderLayer"}, "follows from the model"),
        ({"WORLD_SIZE": "1"}, "add --processes N"),
    ],
)
def test_a_configuration_of_one_s_own_that_would_not_hold_is_refused(
    variables: dict[str, str], message: str, dataset: Callable[..., Path], on_two_gpus: None
) -> None:
    recipe = load_recipe(dataset(evaluation={"rows_in_training": 0}))
    os.environ.update(set_by_accelerate("fsdp"))
    os.environ.update(variables)
    with pytest.raises(RecipeError, match=message):
        use_engine(recipe, "mine.yaml")


def test_without_a_gpu_an_engine_is_refused_and_may_be_tried_dry(
    dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(engines, "has_devices", lambda: False)
    recipe = load_recipe(dataset(evaluation={"rows_in_training": 0}), ["training.distributed=fsdp"])
    with pytest.raises(RecipeError, match="fsdp runs on GPUs only"):
        use_engine(recipe, "mine.yaml")
    assert use_engine(recipe, "mine.yaml", dry_run=True) == recipe
    assert engine() == "ddp"  # which accelerate would take, and so need not be told


@pytest.mark.slow
@each_engine
def test_an_engine_is_tried_dry_or_says_what_is_missing(
    name: str, dataset: Callable[..., Path]
) -> None:
    recipe = dataset(evaluation={"rows_in_training": 0})
    setting = f"training.distributed={name}"
    if name.startswith("zero") and engines.missing({"": "deepspeed"}):
        with pytest.raises(RecipeError, match="needs the package deepspeed"):
            use_engine(load_recipe(recipe, [setting]), "mine.yaml", dry_run=True)
        return
    done = run(*FINETUNE, "train", str(recipe), setting, "--dry-run", "--processes", "2")
    assert done.returncode == 0, done.stderr
    assert "dry run" in done.stdout


# The launchers


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["python", "-m", "accelerate.commands.launch", "--num_processes", "3", "x"], "for 3 proc"),
        (["/bin/accelerate", "launch", "--config_file", "CONFIG", "-m", "x"], "for 4 processes"),
        (["/bin/accelerate", "launch", "--config-file=CONFIG", "-m", "x"], "for 4 processes"),
        (["/bin/accelerate", "launch", "--config_file", "CONFIG", "--num_processes", "1"], None),
        (["/bin/accelerate", "launch", "--config_file", "nowhere.yaml", "-m", "x"], None),
        (["python", "-m", "another.launch", "--num_processes", "3"], None),
    ],
)
def test_processes_asked_of_accelerate_by_module_or_file_are_missed_where_one_was_started(
    words: list[str], told: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "own.yaml"
    config.write_text("num_processes: 4\n")
    parent = SimpleNamespace(cmdline=lambda: [w.replace("CONFIG", str(config)) for w in words])
    monkeypatch.setattr("psutil.Process.parent", lambda self: parent)
    if told is None:
        refuse_a_lonely_launch()
        return
    with pytest.raises(RecipeError, match=told):
        refuse_a_lonely_launch()


@pytest.mark.parametrize("place", range(1, 5))
def test_resume_auto_may_stand_anywhere(
    place: int, dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr("finetune.launch.launch", lambda words, num: given.append(words) or 0)
    words = ["train", str(dataset()), "adapter.rank=2", "training.max_steps=1"]
    asked = [*words[:place], "--resume", "auto", *words[place:], "--processes", "2"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.exception
    assert given == [words]  # no run is there, so that one is begun


def failing(error: Exception) -> Callable[..., Any]:
    """In place of torch's `elastic_launch`."""

    def run(*_: str) -> None:
        raise error

    return lambda config, entrypoint: run


def test_a_process_that_the_system_killed_is_told_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failures = {
        0: ProcessFailure(0, 11, 1, ""),  # which lost the other
        1: ProcessFailure(1, 12, -signal.SIGKILL, ""),
    }
    failures[1].timestamp -= 5
    error = ChildFailedError("finetune", failures)
    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", failing(error))
    assert launch(["train"], 2) == 128 + signal.SIGKILL
    told = capsys.readouterr().err
    assert told.startswith("error: process 1 was killed by SIGKILL, most often for want of memory;")
    assert "--resume" in told


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RendezvousConnectionError("it does not answer"), "it does not answer"),
        (RendezvousTimeoutError(), "not all came in time"),
        (RendezvousClosedError(), "RendezvousClosedError"),
    ],
)
def test_machines_that_do_not_meet_are_told_where_they_should_have(
    error: Exception, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PET_NNODES", "4")
    monkeypatch.setenv("PET_RDZV_ENDPOINT", "node-1:29500")
    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", failing(error))
    with pytest.raises(RecipeError, match="PET_RDZV_ENDPOINT: the 4 machines") as found:
        launch(["train"], 2)
    assert "at node-1:29500" in str(found.value)
    assert told in str(found.value)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_machines_of_which_one_ends_before_the_others_are_all_to_be_started_again(
    number: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All were told to stop, and the first to end was the one that they met at."""

    def run(*_: str) -> None:
        os.kill(os.getpid(), number)
        raise RendezvousConnectionError("it does not answer")

    monkeypatch.setattr("psutil.Process.children", lambda self: [])
    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", lambda *_: run)
    assert launch(["train"], 1) == code


def test_an_address_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PET_RDZV_ENDPOINT", "node-1:abc")
    with pytest.raises(RecipeError, match=r"PET_RDZV_ENDPOINT: The port number of .*'node-1:abc'"):
        launch(["train"], 2)


@pytest.mark.slow
def test_processes_whose_launcher_is_killed_save_a_checkpoint_and_end(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    training = {"max_steps": 3000, "batch_size": 1, "logging_steps": 1, "save_steps": 1000}
    recipe = dataset(num_eval=0, training=training)
    launcher = subprocess.Popen(
        [*FINETUNE, "train", str(recipe), "--processes", "2"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    metrics = RunDir(tmp_path / "run").metrics
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.1)
    children = psutil.Process(launcher.pid).children()
    assert len(children) == 2
    launcher.kill()
    launcher.wait()
    _, left = psutil.wait_procs(children, timeout=300)
    for child in left:
        child.kill()
    assert not left
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("checkpoint-*")
    assert 0 < read_json(checkpoint / "trainer_state.json")["global_step"] < 3000


def test_a_process_whose_launcher_was_gone_before_it_began_ends_at_once(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    done = subprocess.run(
        [*FINETUNE, "train", str(dataset())],
        env=os.environ | {"FINETUNE_LAUNCHED": "1"},
        capture_output=True,
        check=False,
    )
    assert done.returncode in (-signal.SIGTERM, 75)  # as a process ends before a run
    assert not (tmp_path / "run").exists()


# Several machines, and what docs/scale.md shows


def test_a_machine_of_several_does_not_train_by_itself(
    dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PET_NNODES", "4")
    monkeypatch.setenv("PET_RDZV_ENDPOINT", "node-1:29500")
    done = CliRunner().invoke(app, ["train", str(dataset())])
    assert isinstance(done.exception, RecipeError)
    assert "add --processes N" in str(done.exception)


def test_machines_that_could_not_find_each_other_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PET_NNODES", "2:4")
    with pytest.raises(RecipeError, match="PET_NNODES: '2:4'"):
        num_nodes()
    monkeypatch.setenv("PET_NNODES", "2")
    with pytest.raises(RecipeError, match="set PET_RDZV_ENDPOINT"):
        num_nodes()
    monkeypatch.setenv("PET_RDZV_ENDPOINT", "localhost:29500")
    assert num_nodes() == 2


@pytest.mark.slow
def test_two_launchers_that_find_each_other_train_one_run_and_end_it_together(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    """As on two machines, each with one process."""
    training = {"max_steps": 3000, "batch_size": 1, "logging_steps": 1, "save_steps": 1000}
    recipe = dataset(num_eval=0, training=training)
    endpoint = f"localhost:{free_port()}"
    variables = {"PET_NNODES": "2", "PET_RDZV_ENDPOINT": endpoint, "OMP_NUM_THREADS": "1"}
    launchers = [
        subprocess.Popen(
            [*FINETUNE, "train", str(recipe), "--processes", "1"],
            env=os.environ | variables,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for _ in range(2)
    ]
    metrics = RunDir(tmp_path / "run").metrics
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.1)
    for launcher in launchers:
        launcher.send_signal(signal.SIGUSR1)
    ended = [launcher.communicate(timeout=300)[1] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [75, 75], ended
    assert "".join(ended).count("--resume --processes 1\n") == 1  # on each, and told by the first
    assert "exitcode" not in "".join(ended)  # torch's words of it
    assert read_json(RunDir(tmp_path / "run").environment)["num_processes"] == 2
    assert len(list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))) == 1


def examples(language: str) -> list[str]:
    text = (Path(__file__).parent.parent / "docs" / "scale.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_scripts_shown_are_ones_that_bash_reads() -> None:
    assert examples("bash")
    for script in examples("bash"):
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_manifests_shown_are_yaml_of_the_kinds_they_say() -> None:
    documents: list[Any] = [each for text in examples("yaml") for each in yaml.safe_load_all(text)]
    assert {each["kind"] for each in documents} >= {"Service", "Job"}
    (job,) = (each for each in documents if each["kind"] == "Job")
    spec = job["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"]
    (container,) = spec["template"]["spec"]["containers"]
    variables = {each["name"]: each.get("value") for each in container["env"]}
    assert variables["PET_NNODES"] == str(spec["completions"])
    (rule,) = (r for r in spec["podFailurePolicy"]["rules"] if "onExitCodes" in r)
    assert rule["action"] == "Ignore"
    assert rule["onExitCodes"]["values"] == [75]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # which the policy asks for
