# One rule a stage, one executed notebook a stage; `make reproduce` calls this with run and configuration.
import atexit
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import torch
import yaml

from densenas.files import root
from densenas.method.space import SearchSpace
from densenas.pipeline import last_words, tied
from densenas.preflight import check_machine, checked, identify
from densenas.settings import RunConfig


def typed(name):
    """A setting as it was typed: Snakemake reads 007 as 7."""
    value = config.get(name) or ""
    for entry in workflow.config_settings.config_args or ():
        key, _, text = entry.partition("=")
        if key == name:
            value = text.strip("'\"")
    if not isinstance(value, str):
        raise ValueError(f"{name} is read as {value!r}: put it in quotes")
    return value


ROOT = root()
try:
    # Everything that can be refused is refused here, before anything runs, in one sentence.
    RUN, configuration = identify(typed("run"), typed("configuration"))
    CONFIGURATION = os.path.normpath(configuration)
    if Path.cwd() != ROOT:
        CONFIGURATION = os.path.abspath(configuration)
    os.environ["DENSENAS_ROOT"] = str(ROOT)  # may have been said relative to where this starts

    workdir: ROOT

    if Path.cwd().resolve() != ROOT.resolve():
        raise ValueError(f"results go to {ROOT}: leave out --directory or set DENSENAS_ROOT")
    if workflow.is_main_process:
        SETTINGS, CONTENTS = checked(Path(CONFIGURATION))
    else:
        # A job that a cluster started, of a run that was looked at before.
        SETTINGS, CONTENTS = RunConfig.load(CONFIGURATION), {}
    INPUT_SIZE = SearchSpace.load(SETTINGS.space).input_size
    PARAMETERS = SETTINGS.parameters(RUN, INPUT_SIZE)
except (ValueError, OSError) as error:
    raise SystemExit(str(error))

NEEDS = {
    "01-data": [],
    "02-cost": ["01-data"],
    "03-search": ["01-data", "02-cost"],
    "04-derive": ["03-search"],
    "05-retrain": ["04-derive"],
    "06-evaluate": ["05-retrain"],
    "07-figures": ["06-evaluate"] + [f"budgets/{cost:g}" for cost in SETTINGS.derive.budgets],
}
# Relative: papermill writes the path into the notebook.
NOTEBOOKS = os.path.relpath(Path(workflow.basedir) / "notebooks")
LOGS = f"runs/{RUN}/logs"
# A stage must not outlive a killed pipeline: the kernel ends with papermill, papermill with its parent.
PYTHON = f"exec {shlex.join([*tied(), sys.executable])} -m"
PAPERMILL = f"{PYTHON} papermill --log-level WARNING --no-progress-bar --stdout-file -"
STAGE = (
    "{PAPERMILL} {input.notebook:q} {output.notebook:q}"
    " --parameters_yaml {params.parameters:q} 2> {log:q}"
)


def as_yaml(stage):
    """A stage's parameters; where JSON writes 1e-05, papermill would read a string."""
    parameters = yaml.safe_dump(PARAMETERS[stage], default_flow_style=True, width=10**6).strip()
    # They may hold braces: Snakemake seeks wildcards in text, not in a function's value.
    return lambda wildcards: parameters


def on_gpu(device):
    """Whether the jobs that compute on this device have a GPU here, which they would share."""
    return device != "cpu" and torch.cuda.is_available()


def print_last_words(logs):
    print("", *last_words(logs), sep="\n", file=sys.stderr)


onstart:
    shutil.rmtree(LOGS, ignore_errors=True)
    if workflow.local_exec:  # or else other machines compute
        try:
            check_machine(SETTINGS)
        except ValueError as error:
            raise SystemExit(f"{CONFIGURATION}: {error}")


onerror:
    # At the very end, under what Snakemake still has to say.
    atexit.register(print_last_words, Path(LOGS).absolute())


rule all:
    input:
        expand("runs/{run}/{stage}.done", run=RUN, stage=NEEDS),
        expand("reports/{run}/{stage}.ipynb", run=RUN, stage=NEEDS),


for stage, needs in NEEDS.items():

    rule:
        name:
            stage
        input:
            notebook=f"{NOTEBOOKS}/{stage}.ipynb",
            done=expand("runs/{run}/{need}.done", run=RUN, need=needs),
        output:
            notebook=f"reports/{RUN}/{stage}.ipynb",
            # Not in git: a fresh clone runs everything, whatever results it came with.
            done=touch(f"runs/{RUN}/{stage}.done"),
        params:
            parameters=as_yaml(stage),
            contents=CONTENTS.get(stage, ""),  # what the stage reads from outside, as a hash
        log:
            f"{LOGS}/{stage}.log",
        threads: workflow.cores
        message:
            f"== {stage} =="
        shell:
            STAGE


# Networks at other budgets of the same search, each a job of its own: side by side where they take a core each.
if SETTINGS.derive.budgets:
    ALONE = SETTINGS.retrain.devices > 1 or on_gpu(SETTINGS.retrain.device)
    BUDGET = f"{PYTHON} densenas.budgets {shlex.quote(CONFIGURATION)} {RUN}"

    rule budget:
        input:
            f"runs/{RUN}/04-derive.done",
        output:
            touch(f"runs/{RUN}/budgets/{{budget}}.done"),
        params:
            retrain=PARAMETERS["05-retrain"],
            contents=CONTENTS.get("05-retrain", ""),
        log:
            f"{LOGS}/budget_{{budget}}.log",
        threads: workflow.cores if ALONE else 1
        wildcard_constraints:
            budget="[^/]+",
        message:
            "== the network at {wildcards.budget} =="
        shell:
            "{BUDGET} {wildcards.budget} 2> {log:q}"


# The study: `snakemake evidence`, or any of its files, here or on a cluster. Each network is a job of one thread, or of a
# whole machine where it takes the GPU: side by side they would not fit, nor take the seconds that are compared.
if SETTINGS.evidence:
    from densenas.evidence import Job, Study
    from densenas.runs.run import Run

    FOLDER = f"runs/{RUN}/evidence/{{job}}"
    STEP = f"{PYTHON} densenas.evidence {shlex.quote(CONFIGURATION)} {RUN}"
    SETTINGS_09 = SETTINGS.stages(INPUT_SIZE)["09-evidence"]
    STUDY = Study(Run(RUN), SETTINGS_09)
    THREADS = workflow.cores if on_gpu(SETTINGS_09.device) else 1
    HOW = [SETTINGS_09.precision, SETTINGS_09.device]
    HOW += ["deterministic"] if SETTINGS_09.deterministic else []
    HOW += [CONTENTS[stage] for stage in ("05-retrain", "09-evidence") if CONTENTS.get(stage)]

    def searches(wildcards):
        """What a job's training waits for besides the costs."""
        return [f"runs/{RUN}/evidence/{job}/searched.json" for job in STUDY.searches(Job.parse(wildcards.job))]

    rule evidence:
        input:
            notebook=f"{NOTEBOOKS}/09-evidence.ipynb",
            results=expand(f"{FOLDER}/result.json", job=STUDY.jobs()),
        output:
            notebook=f"reports/{RUN}/09-evidence.ipynb",
            done=touch(f"runs/{RUN}/09-evidence.done"),
        params:
            parameters=as_yaml("09-evidence"),
        log:
            f"{LOGS}/09-evidence.log",
        threads: workflow.cores
        message:
            "== 09-evidence =="
        shell:
            STAGE

    rule searched:
        input:
            f"runs/{RUN}/02-cost.done",
        output:
            f"runs/{RUN}/evidence/{{way}}_{{target}}_{{seed}}/searched.json",
        params:
            search=lambda wildcards: [SETTINGS_09.search, SETTINGS_09.searches[wildcards.way]],
            how=HOW,
        log:
            f"{LOGS}/{{way}}_{{target}}_{{seed}}.search.log",
        threads: THREADS
        wildcard_constraints:
            way="|".join(map(re.escape, SETTINGS_09.searches)),
            target="[^_/]+",
            seed="[0-9]+",
        message:
            "search by {wildcards.way} for {wildcards.target} M Mult-Adds, seed {wildcards.seed}"
        shell:
            "{STEP} search {wildcards.way}_{wildcards.target}_{wildcards.seed} 2> {log:q}"

    rule trained:
        input:
            f"runs/{RUN}/02-cost.done",
            searches,
        output:
            f"{FOLDER}/result.json",
        params:
            retrain=SETTINGS_09.retrain,
            how=HOW,
        log:
            f"{LOGS}/{{job}}.train.log",
        threads: THREADS
        wildcard_constraints:
            job="[^/]+",
        message:
            "train {wildcards.job}"
        shell:
            "{STEP} train {wildcards.job} 2> {log:q}"
