"""The commands of the command line, one file each: `EXAMPLE` for its help, and `run(arguments)`, which returns its exit
code."""

from engrax.commands import (
    bench,
    check,
    compare,
    compile,
    completion,
    describe,
    doctor,
    evaluate,
    export,
    frontier,
    generate,
    harness,
    launch,
    list,
    merge,
    reproduce,
    sample,
    sweep,
    tokenize,
    train,
)

MODULES = (
    sample,
    train,
    launch,
    evaluate,
    harness,
    generate,
    export,
    merge,
    describe,
    compile,
    tokenize,
    sweep,
    compare,
    frontier,
    reproduce,
    check,
    list,
    bench,
    doctor,
    completion,
)  # as in the help
COMMANDS = {module.__name__.rpartition(".")[2]: module.run for module in MODULES}
EXAMPLES = [module.EXAMPLE for module in MODULES]
