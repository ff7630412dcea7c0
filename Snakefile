# One rule a stage, one executed notebook a stage; `make reproduce` calls this with run and configuration.
import os
import shlex

import yaml
from snakemake.exceptions import WorkflowError

from densenas.run import Run, RunConfig

RUN = str(config.get("run", "digits"))
try:
    # Everything that can be refused is refused here, before anything runs.
    Run(RUN)
    PARAMETERS = RunConfig.load(config.get("configuration", f"data/configs/{RUN}.yml")).parameters(RUN)
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
            # YAML of its own making: it writes 1.0e-05 where JSON's 1e-05 would be read as a string.
            parameters=shlex.quote(yaml.safe_dump(PARAMETERS[stage], default_flow_style=True, width=10**6).strip()),
        threads: workflow.cores
        message:
            f"== {stage} =="
        # A stage must not outlive a killed pipeline: the kernel ends with papermill, papermill with its parent.
        shell:
            "exec setpriv --pdeathsig KILL papermill --log-level WARNING --no-progress-bar --stdout-file -"
            " {input.notebook} {output.notebook} --parameters_yaml {params.parameters}"
