"""Processes that save: killed at a step on files, or several at one moment."""

import os
import sys
import traceback

SAVED, REFUSED, FAILED = 0, 3, 1


def killed_after(events, save):
    """Runs `save` in a process that ends, without any clean-up, at its n-th step on files; whether it came to its end."""
    pid = os.fork()
    if pid == 0:
        left = [events]

        def end(event, args):
            if event in ("open", "os.rename", "os.remove", "os.mkdir"):
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)

        try:
            sys.addaudithook(end)
            save()
            os._exit(0)
        except BaseException:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 9)
    return status == 0


def at_once(saves):
    """Runs each in a process of its own, all from one moment on; how each ended."""
    go, pids = os.pipe(), []
    for save in saves:
        if (pid := os.fork()) == 0:
            end = FAILED
            try:
                os.close(go[1])
                os.read(go[0], 1)
                save()
                end = SAVED
            except ValueError as e:
                end = REFUSED if "another process or thread saves into" in str(e) else FAILED
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(end)
        pids.append(pid)
    os.close(go[1])  # all read its end
    ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    os.close(go[0])
    return ends
