# One rule a stage, one executed notebook a stage; `make reproduce` calls this with run and configuration.
import os
import shlex

import yaml
from snakemake.exceptions import WorkflowError

from densenas.run import Run, RunConfig

RUN = str(config.get("run", "digits"))
CONFIGURATION = config.get("configuration", f"data/configs/{RUN}.yml")
try:
    # Everything that can be refused is refused here, before anything runs.
    Run(RUN)
    PARAMETERS = RunConfig.load(CONFIGURATION).parameters(RUN)
except (ValueError, FileNotFoundError) as error:
    raise WorkflowError(str(error))

NEEDS = {
    "01-data": [],
    "02-cost": ["01-data"],
    "03-search": ["01-data", "02-cost"],
    "04-derive": ["03-search"],
    "05-retrain": ["04-derive"],
    "06-evaluate": ["05-retrain"],
    "07-figures": ["06-evaluate"],
}
# A stage must not outlive a killed pipeline: the kernel ends with papermill, papermill with its parent.
WITH_PARENT = "exec setpriv --pdeathsig KILL"
PAPERMILL = (
    f"{WITH_PARENT} papermill --log-level WARNING --no-progress-bar --stdout-file -"
    " {input.notebook} {output.notebook} --parameters_yaml {params.parameters}"
)


def as_argument(stage):
    """A stage's parameters as YAML for the shell; where JSON writes 1e-05, papermill would read a string."""
    return shlex.quote(yaml.safe_dump(PARAMETERS[stage], default_flow_style=True, width=10**6).strip())


rule all:
    input:
        expand("runs/{run}/{stage}.done", run=RUN, stage=NEEDS),
        expand("reports/{run}/{stage}.ipynb", run=RUN, stage=NEEDS),


for stage, needs in NEEDS.items():

    rule:
        name:
            stage
        input:
            notebook=f"notebooks/{stage}.ipynb",
            done=expand("runs/{run}/{need}.done", run=RUN, need=needs),
        output:
            notebook=f"reports/{RUN}/{stage}.ipynb",
            # Not in git: a fresh clone runs everything, whatever results it came with.
            done=touch(f"runs/{RUN}/{stage}.done"),
        params:
            parameters=as_argument(stage),
        threads: workflow.cores
        message:
            f"== {stage} =="
        shell:
            PAPERMILL


# The study: `snakemake evidence`, or any of its files, here or on a cluster. Each network is a job of one thread.
if STUDY := PARAMETERS.get("09-evidence"):
    from densenas.evidence import SEARCHED, Study

    RESULT = f"runs/{RUN}/evidence/{{job}}/result.json"
    STEP = f"{WITH_PARENT} python -m densenas.evidence {shlex.quote(str(CONFIGURATION))} {RUN}"

    rule evidence:
        input:
            notebook="notebooks/09-evidence.ipynb",
            results=expand(RESULT, job=Study(**STUDY).jobs()),
        output:
            notebook=f"reports/{RUN}/09-evidence.ipynb",
            done=touch(f"runs/{RUN}/09-evidence.done"),
        params:
            parameters=as_argument("09-evidence"),
        threads: workflow.cores
        message:
            "== 09-evidence =="
        shell:
            PAPERMILL

    rule searched:
        input:
            f"runs/{RUN}/02-cost.done",
        output:
            f"runs/{RUN}/evidence/{SEARCHED}_{{target}}_{{seed}}/searched.json",
        params:
            search=STUDY["search"],
        message:
            "search for {wildcards.target} M Mult-Adds, seed {wildcards.seed}"
        shell:
            "{STEP} search {SEARCHED}_{wildcards.target}_{wildcards.seed}"

    rule trained:
        input:
            f"runs/{RUN}/02-cost.done",
            lambda job: [RESULT.replace("result", "searched").format(**job)] if job.job.startswith(SEARCHED) else [],
        output:
            RESULT,
        params:
            retrain=STUDY["retrain"],
        wildcard_constraints:
            job="[^/]+",
        message:
            "train {wildcards.job}"
        shell:
            "{STEP} train {wildcards.job}"
