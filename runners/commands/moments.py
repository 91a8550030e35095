"""The command that collects second moments: ``moments``."""

from causalcone.runners.commands.shared import print_line, takes
from causalcone.runners.options import CollectingOptions, ComputeOptions, MomentsFileOptions, TextOptions


@takes(ComputeOptions, TextOptions, CollectingOptions, MomentsFileOptions)
def moments(
    compute: ComputeOptions, texts: TextOptions, collecting: CollectingOptions, file: MomentsFileOptions
) -> None:
    """Collect second moments, which ROME and MEMIT need: how much MLP keys have of each direction, over running text,
    by default text that the model writes itself.

    Writes OUT (safetensors), which names the model and the texts. An interrupted collection goes on where it was.
    """
    from causalcone.runners.edits.moments import collect_to_file

    sentence = collect_to_file(compute, texts, collecting, file)
    if not file.quiet:
        print_line(sentence)


COMMANDS = {
    moments: """
causalcone moments --model gpt2-xl
causalcone moments --model gpt2-xl --texts wikipedia.txt --layers 13,14,15,16,17 --out xl.safetensors
causalcone moments --model gpt2-xl --dataset wikitext --dataset-config wikitext-103-raw-v1 --out xl.safetensors
"""
}
