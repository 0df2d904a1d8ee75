/** Every part of the model against diffusers and transformers, on the CPU's references. */
import { componentSuite } from "../support/golden_suite_components.ts";
import { openReference } from "../support/reference_provider.ts";
import { ownDevice } from "../support/test_device.ts";

componentSuite(ownDevice("reference", openReference));
