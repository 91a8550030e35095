"""The command that writes edits as models and adapters: ``export``."""

from causalcone.runners.commands.shared import print_line, takes
from causalcone.runners.options import ExportOptions


@takes(ExportOptions)
def export(choice: ExportOptions) -> None:
    """Write edits that were kept as an edited model, or as an adapter that PEFT loads beside the unedited one.

    Writes OUT, a folder for from_pretrained or PeftModel.from_pretrained, with OUT/causalcone.json about it. Where the
    edits lose by it, in narrow dtypes or smaller ranks, their targets are scored again, and both probabilities shown.
    """
    from causalcone.runners.edits.exports import export_kept

    print_line(export_kept(choice))


COMMANDS = {
    export: """
causalcone export --model gpt2-xl --edits edits --edit 7/error_injection/rome-1/17 --out edited
causalcone export --model gpt2-xl --edits mass --edit all --format peft --max-rank 64 --dtype bfloat16 --out adapter
"""
}
