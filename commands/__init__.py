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
    launch,
    list,
    merge,
    sweep,
    tokenize,
    train,
)

MODULES = (
    train,
    launch,
    evaluate,
    generate,
    export,
    merge,
    describe,
    compile,
    tokenize,
    sweep,
    compare,
    frontier,
    check,
    list,
    bench,
    doctor,
    completion,
)  # as in the help
COMMANDS = {module.__name__.rpartition(".")[2]: module.run for module in MODULES}
EXAMPLES = [module.EXAMPLE for module in MODULES]
