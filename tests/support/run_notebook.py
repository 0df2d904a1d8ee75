"""Runs a notebook's code cells with Deno's kernel and prints a JSON list with one entry for each.

    python3 run_notebook.py DENO NOTEBOOK [TEXT REPLACEMENT]...

DENO is the program's path. Each TEXT stands in a code cell and is replaced before it runs. An entry has the cell's
"source" and its "outputs" as a notebook file has them; an update of a display stands in the place of what it updates. A
cell that fails has an output of type "error", and the cells behind it are not run. Needs jupyter_client.
"""

import json
import os
import pathlib
import queue
import sys
import tempfile

from jupyter_client.manager import start_new_kernel

# Seconds that a cell may take.
LIMIT = 600
# Deno's kernel says that a cell is done before all of its outputs have arrived; for so long the last ones are waited for.
LATE = 1


def main(deno: str, path: str, *replacements: str) -> None:
    notebook = json.loads(pathlib.Path(path).read_text())
    sources = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for text, replacement in zip(replacements[::2], replacements[1::2]):
        if not any(text in source for source in sources):
            sys.exit(f"no code cell of {path} has {text!r}")
        sources = [source.replace(text, replacement) for source in sources]
    # A kernel of our own instead of an installed one: nothing outside of this folder is changed.
    with tempfile.TemporaryDirectory() as folder:
        kernel = pathlib.Path(folder, "kernels", "deno")
        kernel.mkdir(parents=True)
        argv = [deno, "jupyter", "--kernel", "--conn", "{connection_file}"]
        spec = {"argv": argv, "display_name": "Deno", "language": "typescript"}
        (kernel / "kernel.json").write_text(json.dumps(spec))
        os.environ["JUPYTER_PATH"] = folder
        manager, client = start_new_kernel(kernel_name="deno", cwd=str(pathlib.Path(path).resolve().parent))
        try:
            cells = run(client, sources)
        finally:
            client.stop_channels()
            manager.shutdown_kernel(now=True)
    json.dump(cells, sys.stdout)


def run(client, sources: list) -> list:
    cells = []
    by_message = {}
    displays = {}

    def take(message: dict) -> bool:
        """Adds a message to the outputs of the cell that it belongs to; whether that cell is now done."""
        cell = by_message.get(message["parent_header"].get("msg_id"))
        if cell is None:
            return False
        kind, content = message["msg_type"], message["content"]
        display = content.get("transient", {}).get("display_id")
        output = {"output_type": kind, **content}
        if kind == "update_display_data" and display in displays:
            displays[display].update(output, output_type="display_data")
        elif kind in ("stream", "display_data", "update_display_data", "execute_result", "error"):
            cell["outputs"].append(output)
            if display is not None:
                displays[display] = output
        return kind == "status" and content["execution_state"] == "idle"

    for source in sources:
        cell = {"source": source, "outputs": []}
        cells.append(cell)
        by_message[client.execute(source)] = cell
        while not take(client.get_iopub_msg(timeout=LIMIT)):
            pass
        reply = client.get_shell_msg(timeout=LIMIT)
        if reply["content"]["status"] != "ok":
            break
    try:
        while True:
            take(client.get_iopub_msg(timeout=LATE))
    except queue.Empty:
        return cells


main(*sys.argv[1:])
