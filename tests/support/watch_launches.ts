import type { GpuDevice } from "../../ffi/gpu.ts";

/** Calls `seen` with what is launched, before it is, until it is disposed. */
export function watchLaunches(
  device: GpuDevice,
  seen: (...launched: Parameters<GpuDevice["launch"]>) => void,
): Disposable {
  const { launch } = device;
  device.launch = (...launched) => {
    seen(...launched);
    launch.apply(device, launched);
  };
  return { [Symbol.dispose]: () => void (device.launch = launch) };
}
