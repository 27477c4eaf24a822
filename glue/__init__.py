"""The programs around the method, each run as `python -m glue.NAME`."""

import contextlib
import os
import sys


def run_program(parser, work, argv):
    """Parse the command line `argv`, call `work(options)`, and return the exit status.

    The status is what `work` returns, or 0 if it returns None. It is 130 after Ctrl-C.
    It is 2 after a UserError, an error of a file, or too little memory: each prints
    one line to stderr.
    """
    # Imported late, because glue.toy runs without torch.
    from model import UserError, escape_control_chars, open_closed_streams
    open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        # The stream's encoding may lack the letters of a label. A closed stream is None.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    # These programs and the trainings that they start are single processes, whatever
    # WORLD_SIZE a cluster exports.
    os.environ.pop("WORLD_SIZE", None)
    try:
        return work(parser.parse_args(argv)) or 0
    except BrokenPipeError:
        # The reader has closed the pipe. Python must not flush stdout when it exits.
        sys.stdout = None
        return 0
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        text = " ".join(str(error).split()) or "out of memory"
        if isinstance(error, RuntimeError) and "memory" not in text:
            raise
        # stderr may be on a full disk, too.
        with contextlib.suppress(OSError):
            # File names and a server's answer may hold control characters.
            print(f"{parser.prog}: error: {escape_control_chars(text)}", file=sys.stderr)
        return 2
