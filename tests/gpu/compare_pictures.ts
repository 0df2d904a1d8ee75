/** Prints the PSNR of two PNGs, in dB; an error where it is below 40, about what two libraries' roundings explain. */
import { decode, type Image } from "imagescript";
import { psnr } from "../../recipes/base/psnr.ts";

const pictures = await Promise.all(
  Deno.args.slice(0, 2).map(async (path) => {
    const { bitmap } = await decode(await Deno.readFile(path)) as Image;
    return Uint8Array.from(bitmap).filter((_, i) => i % 4 !== 3); // without the opacity
  }),
);
const decibels = psnr(pictures[0], pictures[1]);
console.log(`PSNR ${decibels.toFixed(1)} dB`);
if (!(decibels > 40)) Deno.exit(1);
