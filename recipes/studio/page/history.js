/** What was drawn, kept by the browser (IndexedDB), so that it is there after a reload. */

const STORE = "drawings";
/** Older ones are deleted. */
const MOST = 60;

function promised(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

async function store(mode) {
  const request = indexedDB.open("flux-recipes-studio", 1);
  request.onupgradeneeded = () =>
    request.result.createObjectStore(STORE, { keyPath: "id", autoIncrement: true });
  return (await promised(request)).transaction(STORE, mode).objectStore(STORE);
}

/** All entries, the latest first. */
export async function entries() {
  return (await promised((await store("readonly")).getAll())).reverse();
}

/** Keeps an entry, and gives its id. */
export async function keep(entry) {
  const drawings = await store("readwrite");
  const id = await promised(drawings.add(entry));
  const ids = await promised(drawings.getAllKeys());
  for (const old of ids.slice(0, Math.max(0, ids.length - MOST))) drawings.delete(old);
  return id;
}

export async function forgetAll() {
  await promised((await store("readwrite")).clear());
}
