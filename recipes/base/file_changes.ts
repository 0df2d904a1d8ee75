/** Events that belong to one change come within this many milliseconds: editors write, rename and change times. */
const QUIET = 60;

/**
 * Watches the files in folders, not those of folders in them, from the call on; gives the paths of each change.
 *
 * @throws Deno.errors.NotFound for a folder that is not there
 */
export function fileChanges(folders: readonly string[]): AsyncGenerator<string[], void> {
  return grouped(Deno.watchFs([...folders], { recursive: false }));
}

async function* grouped(watcher: Deno.FsWatcher): AsyncGenerator<string[], void> {
  const events = watcher[Symbol.asyncIterator]();
  let next = events.next();
  try {
    for (;;) {
      const first = await next;
      if (first.done) return;
      const paths = new Set<string>();
      for (let event: IteratorResult<Deno.FsEvent> | undefined = first; event !== undefined;) {
        if (event.done) return;
        if (event.value.kind !== "access") event.value.paths.forEach((path) => paths.add(path));
        next = events.next();
        event = await nextWithin(next, QUIET);
      }
      if (paths.size > 0) yield [...paths];
    }
  } finally {
    watcher.close();
  }
}

async function nextWithin<T>(next: Promise<T>, milliseconds: number): Promise<T | undefined> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const late = new Promise<undefined>((resolve) => {
    timer = setTimeout(resolve, milliseconds, undefined);
  });
  return await Promise.race([next, late]).finally(() => clearTimeout(timer));
}
