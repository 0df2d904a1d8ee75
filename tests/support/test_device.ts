import type { Device } from "../../ffi/device.ts";

/** A device that a suite of tests runs on. */
export interface TestDevice<D extends Device = Device> {
  /** For the names of the tests. */
  readonly name: string;
  /** Why it is not there, or undefined where it is. */
  readonly skip: string | undefined;
  /** Calls a test's body with the device. */
  readonly use: (body: (device: D) => void | Promise<void>) => Promise<void>;
}

/** A device that each test opens for itself. */
export function ownDevice<D extends Device>(
  name: string,
  open: () => D | Promise<D>,
  skip?: string,
): TestDevice<D> {
  return {
    name,
    skip,
    use: async (body) => {
      using device = await open();
      await body(device);
    },
  };
}

/** Defines the test `<title> (<device>)`; skipped, with a word in its name, where the device is not there. */
export function testOn<D extends Device>(
  { name, skip, use }: TestDevice<D>,
  title: string,
  body: (device: D) => void | Promise<void>,
): void {
  Deno.test({
    name: `${title} (${skip === undefined ? name : `${name}; skipped: ${skip}`})`,
    ignore: skip !== undefined,
    fn: () => use(body),
  });
}
