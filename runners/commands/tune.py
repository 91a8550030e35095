"""The command that tunes editing: ``tune``."""

from rich.console import Console

from causalcone.runners.commands.shared import print_line, takes
from causalcone.runners.options import OutputOptions, TuningOptions, TuningSourceOptions


@takes(TuningSourceOptions, TuningOptions, OutputOptions)
def tune(source: TuningSourceOptions, tuning: TuningOptions, output: OutputOptions) -> None:
    """Try hyperparameters of editing on a few facts at one layer, choose, and write a preset (Hase et al. 2023).

    Of each method the setting with the highest mean rewrite score is chosen, of those that are not above --most and
    whose paraphrase and neighbourhood scores are within --give-up of the best.

    Writes OUT/preset.toml for --preset, OUT/tuning.json and OUT/tuning.parquet with all scores, and the edits of every
    setting below OUT/grid. Whatever ends it, the same command goes on with the settings that are not done.
    """
    from causalcone.runners.tuning.results import score_tables
    from causalcone.runners.tuning.tune import tune as run_tuning

    results = run_tuning(source, tuning, output, Console())
    if not output.quiet:
        for table in score_tables(results):
            Console().print(table)
        print_line(f"preset -> {output.out / 'preset.toml'}")


COMMANDS = {
    tune: """
causalcone tune --model gpt2-xl --facts counterfact.json --method finetune:1 --method finetune:5 --layer 17 --out tuned
causalcone tune --model gpt2-xl --facts counterfact.json --method rome --layer 17 --preset gpt2-xl
--moments m.safetensors --problem error_injection --problem fact_forcing --out tuned
causalcone tune --model demo --facts demo --method memit:3 --layer 4 --preset demo --moments demo
--grid memit.covariance_weight=100,200,400 --out tuned
causalcone edit --model gpt2-xl --facts counterfact.json --method finetune:5 --preset tuned/preset.toml --out edits
"""
}
