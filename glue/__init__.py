"""The programs around the method, each run as `python -m glue.NAME`; here, how all of them end."""

import contextlib
import sys


def run_program(parser, work, argv):
    """Parse the words `argv` and do `work(options)`. Returns the exit status: what `work` returns,
    else 0; 2 after an error told in one line: a UserError, one of a file or of too little memory;
    130 after Ctrl-C."""
    from model import UserError, escape_control_chars                           # glue.toy needs no torch
    for stream in (sys.stdout, sys.stderr):
        # Its encoding may lack the letters of a label; and it is None where it is closed.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        return work(parser.parse_args(argv)) or 0
    except BrokenPipeError:
        # Nobody reads any more, nor what Python would still write when it exits.
        sys.stdout = None
        return 0
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        text = " ".join(str(error).split()) or "out of memory"
        if isinstance(error, RuntimeError) and "memory" not in text:
            raise
        with contextlib.suppress(OSError):                           # stderr may be full as well
            # Names of files and a server's words may hold anything.
            print(f"{parser.prog}: error: {printable(text)}", file=sys.stderr)
        return 2
