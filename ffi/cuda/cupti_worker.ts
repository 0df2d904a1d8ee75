/** The thread that {@link ActivityBuffers} answers CUPTI's callbacks on. It calls no native code itself. */
import { parentPort } from "node:worker_threads";
import { BUFFER_BYTES, type CallbackAddresses } from "./cupti_buffers.ts";

/** What CUPTI has and writes into whenever it likes, by address. */
const lent = new Map<bigint, Uint8Array<ArrayBuffer>>();
/** What it has given back, up to the last valid byte. */
let completed: Uint8Array<ArrayBuffer>[] = [];

// void (*CUpti_BuffersCallbackRequestFunc)(uint8_t **buffer, size_t *size, size_t *maxNumRecords)
const requested = Deno.UnsafeCallback.threadSafe(
  { parameters: ["pointer", "pointer", "pointer"], result: "void" } as const,
  (buffer, size, maxNumRecords) => {
    const bytes = new Uint8Array(BUFFER_BYTES);
    const address = Deno.UnsafePointer.value(Deno.UnsafePointer.of(bytes));
    lent.set(address, bytes);
    write(buffer, address);
    write(size, BigInt(bytes.length));
    write(maxNumRecords, 0n); // as many as fit
  },
);

// void (*CUpti_BuffersCallbackCompleteFunc)(CUcontext context, uint32_t streamId, uint8_t *buffer, size_t size,
//     size_t validSize)
const returned = Deno.UnsafeCallback.threadSafe(
  { parameters: ["pointer", "u32", "u64", "usize", "usize"], result: "void" } as const,
  (_context, _streamId, address, _size, validSize) => {
    const bytes = lent.get(address);
    lent.delete(address);
    if (bytes !== undefined && validSize > 0n) completed.push(bytes.subarray(0, Number(validSize)));
  },
);

/** Writes a pointer or a size_t. */
function write(target: Deno.PointerValue, value: bigint): void {
  new BigUint64Array(Deno.UnsafePointerView.getArrayBuffer(target!, 8))[0] = value;
}

// Any message asks for what is completed.
parentPort!.on("message", () => {
  const buffers = completed;
  completed = [];
  parentPort!.postMessage(buffers, buffers.map(({ buffer }) => buffer));
});
const addresses: CallbackAddresses = {
  requested: Deno.UnsafePointer.value(requested.pointer),
  completed: Deno.UnsafePointer.value(returned.pointer),
};
parentPort!.postMessage(addresses);
