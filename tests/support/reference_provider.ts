import type { ConvPlan, DeviceProperties, MatmulPlan } from "../../ffi/device.ts";
import { CpuDevice } from "../../ffi/cpu/device.ts";
import type { CpuProvider } from "../../ffi/cpu/provider.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { conv2dReference } from "../../kernels/conv2d.ts";
import { copyStrided, readFloat32, writeFloat32 } from "../../kernels/cpu.ts";
import { linearReference } from "../../kernels/linear.ts";

/** Matrix products and convolutions by the plain TypeScript references: slow, and as simple as can be. */
class ReferenceProvider implements CpuProvider {
  properties(): DeviceProperties {
    return {
      description: "reference",
      providers: { matmul: "TypeScript", conv: "TypeScript" },
      nativeBfloat16: false,
    };
  }

  matmul({ a, b, bias, out, alpha = 1 }: MatmulPlan): void {
    const [m, k] = a.shape;
    const result = new Float32Array(m * b.shape[0]);
    const x = readFloat32(a).map((value) => value * alpha);
    linearReference(
      result,
      x,
      readFloat32(b),
      bias === undefined ? new Float32Array(0) : readFloat32(bias),
      k,
    );
    store(out, result);
  }

  conv({ x, weight, bias, out, stride, padding }: ConvPlan): void {
    const result = new Float32Array(out.size);
    conv2dReference(
      result,
      readFloat32(x),
      readFloat32(weight),
      bias === undefined ? new Float32Array(0) : readFloat32(bias),
      { x: x.shape, weight: weight.shape, out: out.shape },
      stride,
      padding,
    );
    store(out, result);
  }

  forget(): void {}

  [Symbol.dispose](): void {}
}

function store(out: Tensor, values: Float32Array): void {
  out.device.scope(() => {
    const dense = Tensor.empty(out.device, out.shape, out.dtype);
    writeFloat32(dense, values);
    copyStrided(out, dense);
  });
}

/** A CPU device on the references. */
export function openReference(): CpuDevice {
  return new CpuDevice(() => new ReferenceProvider());
}
